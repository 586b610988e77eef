import sys

from sib_fast.cli import main

sys.exit(main())
