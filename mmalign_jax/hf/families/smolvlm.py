"""SmolVLM2 (arXiv 2504.05299): Idefics3 under a name of its own. Its videos are not read."""

import dataclasses

from mmalign_jax.hf.families import idefics3

FAMILY = dataclasses.replace(
    idefics3.FAMILY,
    model_type="smolvlm",
    architecture="SmolVLMForConditionalGeneration",
    processor_class="SmolVLMProcessor",
)
