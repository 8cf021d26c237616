"""The protobuf package `mediagen`."""
