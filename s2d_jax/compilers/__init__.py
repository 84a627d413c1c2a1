"""What compilers make of a program: chips that this machine lacks, compiling for them, and reading the compiled program."""
