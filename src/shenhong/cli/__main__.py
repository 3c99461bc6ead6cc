import sys

from shenhong.cli.main import main

sys.exit(main())
