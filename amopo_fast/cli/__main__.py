import sys

from amopo_fast.cli import main

sys.exit(main())
