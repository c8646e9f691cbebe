"""jilju serves large language models and accounts for every token it makes.

    from jilju import LLM, SamplingParams
    print(LLM("smollm2-135m").generate("The sky is")[0].text)

The names are loaded on first use, so that importing one part (the engine process does) does not load them all.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jilju.engine.request import RepetitionDetection, SamplingParams
    from jilju.llm import LLM, Completion

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "RepetitionDetection", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name in ("LLM", "Completion"):
        import jilju.llm

        return getattr(jilju.llm, name)
    if name in ("RepetitionDetection", "SamplingParams"):
        import jilju.engine.request

        return getattr(jilju.engine.request, name)
    raise AttributeError(f"module 'jilju' has no attribute {name!r}")
