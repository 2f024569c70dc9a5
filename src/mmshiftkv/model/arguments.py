"""What transformers calls the argument that takes a cache."""

from dataclasses import fields

from transformers.generation import GenerateDecoderOnlyOutput

# Since transformers 5.24, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values")
# In the installed version: `model.generate(**inputs, **{CACHE_ARGUMENT: cache})` runs on all of them without a warning.
CACHE_ARGUMENT = next(
    name for name in CACHE_ARGUMENTS if name in {field.name for field in fields(GenerateDecoderOnlyOutput)}
)
