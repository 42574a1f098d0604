"""python -m zeroblock"""

import sys

from .cli import main

sys.exit(main())
