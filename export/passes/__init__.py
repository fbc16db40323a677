"""Graph passes, one a file: each a pure function from ModelProto to ModelProto."""
