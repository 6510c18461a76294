"""One target under the fuzzer, with nothing imported before it: python -m fuzzing.one TARGET SECONDS."""

import sys

from fuzzing.__main__ import fuzz

sys.exit(fuzz(sys.argv[1], int(sys.argv[2])))
