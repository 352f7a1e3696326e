"""Families of models: published sizes, and conversion to and from the formats of Hugging Face. Each is one table.

table    the families and their published sizes
configs  the values of config.json
reading  models in folders: opened, checked and loaded
writing  models written to folders and GGUF files
decoder  what several formats of decoders share

The other modules have one family each, or several that share a table.
"""

from jaxlm.families.configs import format_of, read_config
from jaxlm.families.reading import Loaded, Opened, base_of, check_head, load, open_folder
from jaxlm.families.table import FAMILIES, OWN, PRESETS, HeadChoice, Origin
from jaxlm.families.writing import save, save_gguf

__all__ = [
    "FAMILIES",
    "OWN",
    "PRESETS",
    "HeadChoice",
    "Loaded",
    "Opened",
    "Origin",
    "base_of",
    "check_head",
    "format_of",
    "load",
    "open_folder",
    "read_config",
    "save",
    "save_gguf",
]
