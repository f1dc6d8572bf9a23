import sys

from bench.gpu.main import main

sys.exit(main())
