"""For `locust -f`: a user for each protocol, chosen by the targets' URLs, that asks what the options describe."""

from loadtest import users


class GrpcUser(users.TritonGrpcUser):
    """Triton's gRPC streaming."""

    tasks = (users.next_of_workload,)


class HttpUser(users.TritonHttpUser):
    """Triton's generate_stream."""

    tasks = (users.next_of_workload,)


class ChatUser(users.OpenAIUser):
    """OpenAI's completions or chat completions."""

    tasks = (users.next_of_workload,)
