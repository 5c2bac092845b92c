"""The methods, by name. This table is the only list; it has no logic."""

from methods.ada_snapkv import AdaptiveHeads
from methods.allocators import Uniform
from methods.base import Eviction, Full, Method
from methods.h2o import HeavyHitters
from methods.headkv import HeadShares, PaperHeadShares
from methods.knorm import SmallKeys
from methods.pyramidkv import Pyramid
from methods.random import ByLot
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
    "pyramidkv": Eviction(WindowAttention(), Pyramid()),
    "ada_snapkv": Eviction(WindowAttention(), AdaptiveHeads()),
    "headkv_r": Eviction(WindowAttention(), HeadShares("r", beta=1.5)),
    "headkv_er": Eviction(WindowAttention(), HeadShares("er")),
    "headkv_r2": Eviction(WindowAttention(), HeadShares("r2")),
    "headkv_paper": Eviction(WindowAttention(), PaperHeadShares("r2")),
}
