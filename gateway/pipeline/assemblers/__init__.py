"""One assembler for each dialect that generates; `gateway.pipeline.assemble` is the way to them."""
