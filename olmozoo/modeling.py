"""What the model classes of the three wings do alike, in no framework.

The wings import it, and it imports none of them: a rule that is the same in PyTorch, Keras and Flax is written here
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olmozoo.hub import HUB_ARGUMENTS
from olmozoo.typing import HubOptions


def split_options(options: Mapping[str, Any]) -> tuple[HubOptions, dict[str, Any]]:
    """The keywords of `from_pretrained` as options of the hub and fields of the config."""
    hub: Any = {name: value for name, value in options.items() if name in HUB_ARGUMENTS}
    return hub, {name: value for name, value in options.items() if name not in hub}
