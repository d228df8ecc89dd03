"""For `locust -f`: a user for each protocol, chosen by the targets' URLs."""

from loadtest import users


class GrpcUser(users.TritonGrpcUser):
    """Triton's gRPC streaming."""


class HttpUser(users.TritonHttpUser):
    """Triton's generate_stream."""


class ChatUser(users.OpenAIUser):
    """OpenAI's completions or chat completions."""
