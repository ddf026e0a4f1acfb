"""What other people's programs need to know GDN-2: patches, and how to build with them."""
