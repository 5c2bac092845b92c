"""The storages, by name: how a row holds its entries. `int4` keeps every entry in it, `snapkv+int4` those that SnapKV keeps."""

from harness.storage import Storage
from storages.integers import Integers
from storages.kivi import Kivi
from storages.turbo import Turbo

STORAGES: dict[str, Storage] = {
    "int8": Integers(8),
    "int4": Integers(4),
    "turbo-4": Turbo(4, 4),
    "turbo-3": Turbo(3, 3),
    "turbo-k8v4": Turbo(8, 4),
    "kivi-4": Kivi(4),
    "kivi-2": Kivi(2),
}
