"""Damaged and hostile folders, by the thousand: what is read of them is right, or an AlignvecError says why not."""
