"""The contract of the gRPC API, and the code that `make proto` generates from it.

mediagen/v1/generation_service.proto    the contract; fields are added by new numbers only
mediagen/v1/generation_service_pb2*     generated: messages, their types, stubs
buf.yaml                                the rules that `buf lint` holds the contract to
"""
