"""The commands of `tandem`, one module a subject. Each imports what it runs only when it runs."""
