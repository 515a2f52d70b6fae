"""The gRPC services of the gateway: messages in, calls of the pipeline, messages out."""
