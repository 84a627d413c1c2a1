"""How the product with a weight is computed, by format of the weight, number of rows and platform.

Nothing else in the package knows of these forms.
"""
