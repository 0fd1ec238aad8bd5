"""What a number is: formats, rounding, scales, rotation, random bits. Knows no backend."""
