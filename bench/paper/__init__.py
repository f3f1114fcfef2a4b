"""The experiments of arXiv 2410.19206, re-run and extended: `python -m bench.paper`.

An experiment is a file of `experiments/` with a TITLE, `run(setting) -> data`, `section(data, picture) -> Markdown` and
`claims(data) -> [Claim]`. Data are kept in `results/<setting>/<experiment>.json`; the report, docs/paper, is made from
them alone.
"""
