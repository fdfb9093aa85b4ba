"""What `llamagen NAME` does, a thin module per name; part of the program, never imported by the library."""
