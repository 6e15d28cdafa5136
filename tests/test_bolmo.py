"""The Bolmo model: its shapes, where patches end, what may see what, and the same numbers on every mesh."""

import pytest

from minalm.models.config import BolmoConfig, ModelConfig, Rope
from minalm.models.kinds import abstract, parameter_counts
from minalm.models.transformer import leaves

OLMO = dict(norm_eps=1e-6, rope=Rope(500_000.0), pre_norms=False, post_norms=True, qk_norm="all", tied=False)


def published(embed: int, mlp: int, layers: int, heads: int, local_mlp: int) -> BolmoConfig:
    blocks = ModelConfig(100_352, embed, mlp, layers, heads, heads, 128, (None,) * layers, **OLMO)
    return BolmoConfig(260, 100_278, blocks, 16, local_mlp)


@pytest.mark.parametrize(
    "config, blocks, local, total",
    (
        (published(2048, 8192, 16, 16, 2816), 1_073_872_896, 170_752_160, 1_468_911_776),
        (published(4096, 11008, 32, 32, 5504), 6_476_529_664, 674_427_040, 7_633_084_576),
    ),
)
def test_parameter_counts_are_those_of_the_published_models(config, blocks, local, total):
    sizes = {name: leaf.size for name, leaf in leaves(abstract(config)).items()}

    def of(*parts):
        return sum(size for name, size in sizes.items() if name.startswith(parts))

    assert of("patches.") == blocks
    assert of("encoder.", "decoder.", "last.") == local
    assert of("boundary.") == 2 * config.embed**2
    assert of("pool.") == of("depool.") == config.embed**2 + config.embed
    assert parameter_counts(config)["expansion"] == 100_278 * config.embed
    assert parameter_counts(config)["all"] == total
