"""The CSS of all report pages, for light and dark browsers, wide and narrow screens."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
body { color: CanvasText; background: Canvas; }
h1 { font-size: 1.3rem; font-weight: 600; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2.5rem; }
.verdict { font-size: 1.25rem; padding: .8rem 1rem; background: var(--soft); }
.verdict { border-left: .4rem solid #64748b; }
.rose { border-color: #10b981; } .fell { border-color: #ef4444; } .unchanged { border-color: #f59e0b; }
.reasons { padding-left: 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--line); }
.plots { display: grid; gap: 1.5rem; margin-top: 1rem; }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.completions { display: grid; gap: 0 1.5rem; }
.completions { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.question { margin-top: 1.2rem; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 0; } figcaption { font-size: .95rem; }
svg { width: 100%; height: auto; } svg text { font-family: inherit !important; }
blockquote { margin: .2rem 0 .6rem; padding: .4rem .8rem; background: var(--soft); border-radius: .3rem;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto; }
pre { padding: .8rem; background: var(--soft); overflow-x: auto; font-size: .9rem; }
.wide { overflow-x: auto; } .legend span { margin-right: 1.5rem; white-space: nowrap; }
.swatch { display: inline-block; width: 1.4rem; vertical-align: middle; }
.correct { color: #0ca678; } .wrong { color: #e5484d; } .note { opacity: .75; }
"""
