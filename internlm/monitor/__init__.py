"""Monitoring of a run: metrics on the console and in files, and alerts."""

from internlm.monitor.alerts import initialize_monitor_manager as initialize_monitor_manager
from internlm.monitor.alerts import internevo_monitor as internevo_monitor
from internlm.monitor.alerts import send_alert_message as send_alert_message
from internlm.monitor.metrics import MetricsWriter as MetricsWriter
from internlm.monitor.metrics import Throughput as Throughput
from internlm.monitor.metrics import open_writers as open_writers
