"""Pictures of pipeline schedules, simulated or measured: several timelines share one axis of time."""

from internlm.pictures.terminal import text as text
from internlm.pictures.trace import chrome_trace as chrome_trace
from internlm.pictures.vector import html as html
from internlm.pictures.vector import svg as svg
