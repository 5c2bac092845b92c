"""The methods, allocators and conversions, by name. These tables are the only lists; they have no logic."""

from methods.ada_snapkv import AdaptiveHeads
from methods.allocators import Ranked, Uniform
from methods.base import Allocator, Conversion, Eviction, Full, LooksAtPrefill, Method
from methods.cake import LayerPreference, MeanAndVariance
from methods.chunkkv import Chunks
from methods.cla import SharedLayers
from methods.criticalkv import Critical
from methods.cur import Leverage
from methods.defensivekv import WorstCase
from methods.duo_attention import RetrievalHeads
from methods.expected_attention import ExpectedAttention
from methods.gqa import GroupedHeads, Untouched
from methods.h2o import HeavyHitters
from methods.headkv import HeadShares, PaperHeadShares
from methods.keydiff import DistinctKeys
from methods.knorm import SmallKeys
from methods.kvzip import Reconstruction
from methods.lagkv import LagRelative
from methods.mixsga import MixSGA
from methods.pyramidkv import Pyramid
from methods.random import ByLot
from methods.rkv import ImportantAndUnlike
from methods.snapkv import WindowAttention
from methods.streaming_llm import SinksAndRecent
from methods.tova import LastQuery
from methods.triattention import Trigonometric

METHODS: dict[str, Method] = {
    "full": Full(),
    "random": Eviction(ByLot(), Uniform()),
    "streaming_llm": Eviction(SinksAndRecent(), Uniform()),
    "h2o": Eviction(HeavyHitters(), Uniform()),
    "tova": Eviction(LastQuery(), Uniform()),
    "knorm": Eviction(SmallKeys(), Uniform()),
    "snapkv": Eviction(WindowAttention(), Uniform()),
    "rkv": Eviction(ImportantAndUnlike(), Uniform(), every=128),
    "triattention": Eviction(Trigonometric(), Uniform(), every=128),
    "pyramidkv": Eviction(WindowAttention(), Pyramid()),
    "ada_snapkv": Eviction(WindowAttention(), AdaptiveHeads()),
    "headkv_r": Eviction(WindowAttention(), HeadShares("r", beta=1.5)),
    "headkv_er": Eviction(WindowAttention(), HeadShares("er")),
    "headkv_r2": Eviction(WindowAttention(), HeadShares("r2")),
    "headkv_paper": Eviction(WindowAttention(), PaperHeadShares("r2")),
    "keydiff": Eviction(DistinctKeys(), Uniform()),
    "lagkv": Eviction(LagRelative(), Uniform()),
    "cur": Eviction(Leverage(), Uniform()),
    "chunkkv": Eviction(Chunks(), Uniform()),
    "adakv": Eviction(WindowAttention(), Ranked()),
    "cake": Eviction(MeanAndVariance(), LayerPreference()),
    "criticalkv": Eviction(Critical(), Uniform()),
    "critical_adakv": Eviction(Critical(), Ranked()),
    "defensivekv": Eviction(WorstCase(), Ranked(safeguard=0.0)),
    "layer_defensivekv": Eviction(WorstCase(), Ranked("cache", safeguard=0.0)),
    "expected_attention": Eviction(ExpectedAttention(), Uniform()),
    "expected_adakv": Eviction(ExpectedAttention(epsilon=0.01), Ranked()),  # as on kvpress's board
    "duo_attention": Eviction(SinksAndRecent(sinks=64), RetrievalHeads()),
    "kvzip": Eviction(Reconstruction(), Ranked("cache", safeguard=0.0)),
    "kvzip_uniform": Eviction(Reconstruction(), Ranked(safeguard=0.0)),  # the same bytes for every layer
}

# Any allocator may stand behind any scorer: `h2o:pyramid` is H2O's ranking with PyramidKV's shares.
ALLOCATORS: dict[str, Allocator | LooksAtPrefill] = {
    "uniform": Uniform(),
    "pyramid": Pyramid(),
    "adaptive": AdaptiveHeads(),
    "headkv_r": HeadShares("r", beta=1.5),
    "headkv_er": HeadShares("er"),
    "headkv_r2": HeadShares("r2"),
    "ranked": Ranked(),
    "ranked_cache": Ranked("cache", safeguard=0.0),
    "cake": LayerPreference(),
    "duo": RetrievalHeads(),
}

CONVERSIONS: dict[str, Conversion] = {
    "gqa": Conversion("gqa-2: KV heads averaged in groups of 2; ablations gqa-2-first, gqa-2-random", GroupedHeads.of, "groups"),
    "mqa": Conversion("all KV heads averaged into one; ablations mqa-first, mqa-random", GroupedHeads.of),
    "mixsga": Conversion(
        "mixsga-3:1:6: shares of the tokens that keep every head, half, a quarter; mixsga-1x1:2x3: shares x heads a group; "
        "ablation -random",
        MixSGA.of,
        "ratios",
        pairs=True,
    ),
    "cla": Conversion(
        "cla-50: neighbouring layers share keys and values, half as many stored; ablation -first", SharedLayers.of, "percent"
    ),
    "none": Conversion("the model as it is: the control, trained as long", Untouched.of),
}
