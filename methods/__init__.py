"""The methods, allocators and conversions, by name. These tables are the only lists; they have no logic."""

from methods.ada_snapkv import AdaptiveHeads
from methods.allocators import Uniform
from methods.base import Allocator, Conversion, Eviction, Full, Method
from methods.cla import SharedLayers
from methods.gqa import GroupedHeads, Untouched
from methods.h2o import HeavyHitters
from methods.headkv import HeadShares, PaperHeadShares
from methods.knorm import SmallKeys
from methods.mixsga import MixSGA
from methods.pyramidkv import Pyramid
from methods.random import ByLot
from methods.rkv import ImportantAndUnlike
from methods.snapkv import WindowAttention
from methods.streaming_llm import SinksAndRecent
from methods.tova import LastQuery

METHODS: dict[str, Method] = {
    "full": Full(),
    "random": Eviction(ByLot(), Uniform()),
    "streaming_llm": Eviction(SinksAndRecent(), Uniform()),
    "h2o": Eviction(HeavyHitters(), Uniform()),
    "tova": Eviction(LastQuery(), Uniform()),
    "knorm": Eviction(SmallKeys(), Uniform()),
    "snapkv": Eviction(WindowAttention(), Uniform()),
    "rkv": Eviction(ImportantAndUnlike(), Uniform(), every=128),
    "pyramidkv": Eviction(WindowAttention(), Pyramid()),
    "ada_snapkv": Eviction(WindowAttention(), AdaptiveHeads()),
    "headkv_r": Eviction(WindowAttention(), HeadShares("r", beta=1.5)),
    "headkv_er": Eviction(WindowAttention(), HeadShares("er")),
    "headkv_r2": Eviction(WindowAttention(), HeadShares("r2")),
    "headkv_paper": Eviction(WindowAttention(), PaperHeadShares("r2")),
}

# Any allocator may stand behind any scorer: `h2o:pyramid` is H2O's ranking with PyramidKV's shares.
ALLOCATORS: dict[str, Allocator] = {
    "uniform": Uniform(),
    "pyramid": Pyramid(),
    "adaptive": AdaptiveHeads(),
    "headkv_r": HeadShares("r", beta=1.5),
    "headkv_er": HeadShares("er"),
    "headkv_r2": HeadShares("r2"),
}

CONVERSIONS: dict[str, Conversion] = {
    "gqa": Conversion("gqa-2: KV heads averaged in groups of 2; ablations gqa-2-first, gqa-2-random", GroupedHeads.of, "groups"),
    "mqa": Conversion("all KV heads averaged into one; ablations mqa-first, mqa-random", GroupedHeads.of),
    "mixsga": Conversion(
        "mixsga-3:1:6: shares of the tokens that keep every head, half, a quarter; ablation -random", MixSGA.of, "ratios"
    ),
    "cla": Conversion(
        "cla-50: neighbouring layers share keys and values, half as many stored; ablation -first", SharedLayers.of, "percent"
    ),
    "none": Conversion("the model as it is: the control, trained as long", Untouched.of),
}
