"""What ranks.py's fork server imports once for all ranks; importing starts no thread and no device."""

from hive_scale.engine.ds_json import load_deepspeed

load_deepspeed()
