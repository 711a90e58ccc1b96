"""Models and machines to project to: published configurations, vendors' data sheets, and how far peaks are reached."""

from kangaroo.bench.report.projection.parameters import TargetShape
from kangaroo.bench.report.projection.passes import Hardware
from kangaroo.bench.report.projection.shapes import Kernels, Shape


def _llama(name: str, layers: int, width: int, mlp_width: int, heads: tuple[int, int]) -> Shape:
    sizes = TargetShape(
        width=width,
        vocab_size=32_000,
        heads=heads[0],
        key_value_heads=heads[1],
        head_dim=width // heads[0],
        mlp_width=mlp_width,
    )
    return Shape(name=name, layers=layers, sizes=sizes)


VICUNA_7B = _llama("Vicuna-7B", 32, 4096, 11_008, (32, 32))
VICUNA_13B = _llama("Vicuna-13B", 40, 5120, 13_824, (40, 40))
"""config.json of lmsys/vicuna-7b-v1.3 and lmsys/vicuna-13b-v1.3: Llama's sizes (Touvron et al. 2023a, table 2)."""
LLAMA_2_70B = _llama("Llama-2-70B", 80, 8192, 28_672, (64, 8))
"""config.json of meta-llama/Llama-2-70b-hf (Touvron et al. 2023b)."""
BLOOM_176B = Shape(
    name="BLOOM-176B",
    layers=70,
    sizes=TargetShape(
        width=14_336, vocab_size=250_880, heads=112, key_value_heads=112, head_dim=128, mlp_width=4 * 14_336
    ),
    gated=False,
    kernels=Kernels(norm=1, attention=8, mlp=4),  # fused norms and queries, no rotation: by hand, not counted
)
"""config.json of bigscience/bloom (BigScience Workshop 2022). A shape only: this project does not run BLOOM."""

CASES = ((VICUNA_7B, 2), (VICUNA_13B, 3), (LLAMA_2_70B, 5), (BLOOM_176B, 4))
"""Shapes and their exit layers: the paper's for Vicuna, for the others a sixteenth of the layers as in its 7B."""

EFFICIENCY = 0.68
"""The share of peaks that is reached. From one published figure: Llama-2-7B, compiled, its launches captured, writes
104.9 tokens a second on an A100-80GB (README of gpt-fast, PyTorch 2023). For each it reads 13.2 GB: 0.68 of 2,039 GB/s.
Taken to hold of all machines. In the same table Llama-2-70B reaches 0.72 on two devices, 0.64 on four and 0.53 on
eight: plain steps on eight are projected too short."""
LAUNCH_SECONDS = 2.3e-5
"""Per kernel, where Python launches one after the other. Before compilation the same model wrote 25.5 tokens a second
(PyTorch blog 2023, Accelerating Generative AI with PyTorch II): 29.7 ms per token more, over the 1,289 kernels that we
count in it. Other hosts and other code differ from this by much, in both directions; 0 is the other end."""


def _machine(name: str, bytes_per_second: float, flops_per_second: float, memory_bytes: float) -> Hardware:
    return Hardware(
        name=name,
        bytes_per_second=bytes_per_second,
        flops_per_second=flops_per_second,
        launch_seconds=LAUNCH_SECONDS,
        memory_bytes=memory_bytes,
        efficiency=EFFICIENCY,
    )


A100 = _machine("A100-80GB SXM", 2.039e12, 312e12, 80e9)
"""NVIDIA's data sheet; dense float16 on tensor cores, as below."""
H100 = _machine("H100 SXM", 3.35e12, 989.4e12, 80e9)
"""NVIDIA's data sheet, half the figure given there with sparsity."""
RTX_4090 = _machine("RTX 4090", 1.008e12, 165.2e12, 24e9)
"""NVIDIA's Ada architecture white paper; float16 added up in float32."""
MACHINES = (A100, H100, RTX_4090)
