"""The protobuf package `mediagen.v1`: the contract and its generated code."""
