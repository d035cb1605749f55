"""`python -m refine_control`, which launchers such as torchrun need."""

import sys

from refine_control.cli import main

sys.exit(main())
