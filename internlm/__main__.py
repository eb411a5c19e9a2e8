"""``python -m internlm``: the console command."""

import sys

from internlm.cli.main import main

sys.exit(main())
