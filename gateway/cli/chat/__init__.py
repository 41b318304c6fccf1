"""`corral chat`: a talk in a terminal. `options` is loaded by every command; `run` and the rest when it is used."""
