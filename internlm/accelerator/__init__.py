"""Devices: their kinds and control, and the copies between host and device, which are counted."""

from internlm.accelerator.clock import Mark as Mark
from internlm.accelerator.device import current_device as current_device
from internlm.accelerator.device import default_backend as default_backend
from internlm.accelerator.device import device_count as device_count
from internlm.accelerator.device import device_memory as device_memory
from internlm.accelerator.device import device_type as device_type
from internlm.accelerator.device import empty_cache as empty_cache
from internlm.accelerator.device import free_memory as free_memory
from internlm.accelerator.device import peak_memory as peak_memory
from internlm.accelerator.device import set_device as set_device
from internlm.accelerator.device import synchronize as synchronize
from internlm.accelerator.kinds import DEVICE_VARIABLE as DEVICE_VARIABLE
from internlm.accelerator.kinds import HOST as HOST
from internlm.accelerator.kinds import DeviceKind as DeviceKind
from internlm.accelerator.kinds import device_kind as device_kind
from internlm.accelerator.kinds import kind_of as kind_of
from internlm.accelerator.transfer import HostValues as HostValues
from internlm.accelerator.transfer import host_reads as host_reads
from internlm.accelerator.transfer import is_host as is_host
from internlm.accelerator.transfer import read_together as read_together
from internlm.accelerator.transfer import to_device as to_device
from internlm.accelerator.transfer import to_host as to_host
