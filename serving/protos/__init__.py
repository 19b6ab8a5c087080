"""The wire: jmoe.v1. Generated files; see the .proto for what the fields mean."""
