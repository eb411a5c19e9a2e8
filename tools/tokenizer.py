"""Turn text files into tokenized data, as ``internlm tokenize --overwrite`` does."""

from __future__ import annotations

from internlm.cli import parsers
from internlm.cli.tokenizing import tokenize
from internlm.utils.common import FriendlyParser
from internlm.utils.errors import exit_on_user_error

if __name__ == "__main__":
    parser = FriendlyParser()
    parsers.tokenize(parser)
    parser.set_defaults(overwrite=True)  # as older versions of this script do
    exit_on_user_error(tokenize)(parser.parse_args())
