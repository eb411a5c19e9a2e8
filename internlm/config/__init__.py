"""Config of a run: a Python file, resolved into one typed, frozen, validated object."""

from internlm.config.keys import config_hash as config_hash
from internlm.config.keys import masked_dict as masked_dict
from internlm.config.keys import masked_values as masked_values
from internlm.config.keys import to_json as to_json
from internlm.config.keys import with_sources as with_sources
from internlm.config.load import load_file as load_file
from internlm.config.resolve import Resolved as Resolved
from internlm.config.resolve import load_config as load_config
from internlm.config.resolve import resolve as resolve
from internlm.config.schema import Config as Config
from internlm.config.support import check_registered as check_registered
from internlm.config.support import check_runnable as check_runnable
