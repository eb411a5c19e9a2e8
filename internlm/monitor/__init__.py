"""Monitoring of a run: metrics on the console and in files, and alerts.

``internevo_monitor`` reads the run's config, so it is implemented in a higher layer and imported on first use.
"""

from internlm.monitor.alerts import initialize_monitor_manager as initialize_monitor_manager
from internlm.monitor.alerts import send_alert_message as send_alert_message
from internlm.monitor.metrics import MetricsWriter as MetricsWriter
from internlm.monitor.metrics import Throughput as Throughput
from internlm.monitor.metrics import open_writers as open_writers
from internlm.utils.lazy import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, {"internevo_monitor": "internlm.initialize.monitored_main"})
