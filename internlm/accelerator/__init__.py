"""Device functions that differ between CUDA and CPU."""

from internlm.accelerator.device import current_device as current_device
from internlm.accelerator.device import default_backend as default_backend
from internlm.accelerator.device import device_count as device_count
from internlm.accelerator.device import device_memory as device_memory
from internlm.accelerator.device import device_type as device_type
from internlm.accelerator.device import empty_cache as empty_cache
from internlm.accelerator.device import peak_memory as peak_memory
from internlm.accelerator.device import set_device as set_device
from internlm.accelerator.device import synchronize as synchronize
