"""Pictures: timelines of pipeline schedules (simulated or measured), and loss curves."""

from internlm.pictures.loss_curve import loss_curve as loss_curve
from internlm.pictures.terminal import text as text
from internlm.pictures.trace import chrome_trace as chrome_trace
from internlm.pictures.vector import html as html
from internlm.pictures.vector import svg as svg
