"""Names: what OpenTelemetry's conventions for generative AI call what we tell.

The conventions are still in development, so every name of theirs stands here and nowhere else. Names of our own begin with
`jilju.`. Knows nothing of how they are sent.
"""

from typing import Final

PROVIDER: Final = "jilju"

# Metrics, in seconds, and their edges.
DURATION: Final = "gen_ai.server.request.duration"
FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
PER_TOKEN: Final = "gen_ai.server.time_per_output_token"
DURATION_S: Final = tuple(0.01 * 2**power for power in range(14))
FIRST_TOKEN_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

# Operations, by route; all others are a chat.
CHAT: Final = "chat"
OPERATIONS: Final = {"/v1/completions": "text_completion"}

# Attributes of a call.
OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_STREAM: Final = "gen_ai.request.stream"
REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_TOP_K: Final = "gen_ai.request.top_k"
REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
REQUEST_STOPS: Final = "gen_ai.request.stop_sequences"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_FIRST_CHUNK_S: Final = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

# Content, only if it is asked for.
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
SYSTEM_INSTRUCTIONS: Final = "gen_ai.system_instructions"

# Parts of a call, as child spans.
VALIDATE: Final = "validate"
RENDER: Final = "render"
TOKENIZE: Final = "tokenize"
GRAMMAR: Final = "grammar"
QUEUE: Final = "queue"
PREFILL_CHUNK: Final = "prefill chunk {}"  # counted from 1
DECODE: Final = "decode"
RESUME: Final = "resume"
WRITE: Final = "write"
CHOICE_INDEX: Final = "jilju.choice.index"
NUM_TOKENS: Final = "jilju.tokens"
NUM_CACHED_TOKENS: Final = "jilju.cached_tokens"
NUM_PREEMPTIONS: Final = "jilju.preemptions"
