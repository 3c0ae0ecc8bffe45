"""The client: verbs without I/O, the exchange of requests and answers, and its drivers."""
