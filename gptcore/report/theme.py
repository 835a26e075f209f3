"""How reports look: the style sheet, and the script that draws the plots in the reader's colours."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #5b636d; --line: #dfe3e8; --panel: #f5f7f9;
  --accent: #1f6fc5; --good: #1d7a4f; --bad: #b3261e; --good-bg: #e7f5ee; --bad-bg: #fdecea; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ec; --soft: #a2abb5;
  --line: #30363d; --panel: #1c2126; --accent: #6cb0f5; --good: #5fcb97; --bad: #ff8a80; --good-bg: #16291f; --bad-bg: #351b1a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1, h2, h3 { line-height: 1.25; margin: 0; text-wrap: balance; }
h1 { font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; font-weight: 650; letter-spacing: -.01em; }
h3 { font-size: 1rem; font-weight: 600; }
p { margin: .6rem 0; max-width: 46rem; }
.kind { margin: 0 0 .25rem; color: var(--soft); font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; }
.lead { font-size: clamp(1.3rem, 1rem + 1.6vw, 1.85rem); line-height: 1.35; font-weight: 500; letter-spacing: -.012em;
  margin: 1.2rem 0 1.6rem; max-width: 56rem; text-wrap: pretty; }
.intro { color: var(--soft); }
.question { font-size: 1.05rem; color: var(--soft); font-style: italic; }
.findings { margin: 1rem 0; padding-left: 1.2rem; max-width: 46rem; } .findings li { margin: .35rem 0; }
section { margin-top: 3.25rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.sub { margin-top: 2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0 0 1.25rem; }
.tile { background: var(--panel); border-radius: .6rem; padding: .8rem 1rem; min-width: 0; }
.tile dt { color: var(--soft); font-size: .82rem; }
.tile dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile dd.note { font-size: .8rem; font-weight: 400; color: var(--soft); line-height: 1.4; }
.chips { list-style: none; display: flex; flex-wrap: wrap; gap: .4rem; margin: 0; padding: 0; font-size: .82rem; }
.chip { border: 1px solid var(--line); border-radius: 999px; padding: .1rem .7rem; color: var(--soft); }
.chip b { color: var(--ink); font-weight: 600; }
.chip.done b::before { content: "✓ "; color: var(--good); }
.chip.failed { border-color: var(--bad); background: var(--bad-bg); }
.chip.failed b::before { content: "✗ "; color: var(--bad); }
.chip.off b, .chip.absent b { color: var(--soft); }
.callout { border-left: 4px solid var(--bad); background: var(--bad-bg); border-radius: .3rem; padding: .6rem 1rem; margin: 1rem 0; overflow-wrap: anywhere; }
.callout.good { border-color: var(--good); background: var(--good-bg); }
.scroll { overflow-x: auto; margin: 1.1rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .87rem; padding-bottom: .5rem; }
caption span { display: block; position: sticky; left: 0; max-width: min(46rem, calc(100vw - 2rem)); }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--paper); }
th, td { padding: .5rem .75rem; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
td.text:last-child { white-space: normal; min-width: 22rem; }
th:first-child { padding-left: 0; } td:last-child, th:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; border-bottom-color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; }
.text { text-align: left; } .number { text-align: right; }
.bar { display: block; height: 4px; margin: .25rem 0 0 auto; width: 6.5rem; background: var(--line); border-radius: 2px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 2px; }
.tablenote, figcaption { color: var(--soft); font-size: .87rem; margin: .3rem 0; max-width: 46rem; }
figure { margin: 1.6rem 0 0; min-width: 0; }
.figurehead { display: flex; align-items: baseline; justify-content: space-between; gap: 1rem; flex-wrap: wrap; margin-bottom: .5rem; }
.plot { width: 100%; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.5rem; }
.toggle { display: inline-flex; border: 1px solid var(--line); border-radius: .4rem; overflow: hidden; }
.toggle button { font: inherit; font-size: .82rem; color: var(--soft); background: none; border: 0; padding: .15rem .7rem; cursor: pointer; }
.toggle button[aria-pressed=true] { background: var(--panel); color: var(--ink); font-weight: 600; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .75rem 1.5rem; margin: 1rem 0; }
.facts dt { color: var(--soft); font-size: .82rem; } .facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { font: .875rem/1.55 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--panel); border-radius: .6rem; padding: 1rem 1.2rem; margin: .4rem 0 0; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); gap: 0 1.25rem; }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 3.5rem; color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
@media (max-width: 36rem) { main { padding: 1.5rem 1rem 3rem; } section { margin-top: 2.25rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .5rem; } .tile { padding: .6rem .75rem; } .tile dd { font-size: 1.25rem; }
  th, td { padding: .45rem .5rem; } tbody th { white-space: normal; min-width: 5.5rem; } .bar { width: 4.5rem; } }
@media print { body { font-size: 10.5pt; } main { width: 680px; padding: 0; } .row { grid-template-columns: repeat(3, 1fr); }
  .tiles { grid-template-columns: repeat(3, 1fr); } .toggle { display: none; } .scroll { overflow: visible; }
  table { font-size: 8.5pt; } th, td { padding: .3rem .4rem; white-space: normal; } .number { white-space: nowrap; } thead .number { white-space: normal; } tbody th, thead th:first-child { position: static; }
  figure, table, .tile, .callout, pre { break-inside: avoid; } h2, h3 { break-after: avoid; } section { margin-top: 1.5rem; } }
"""

SCRIPT = """
(() => {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  let printing = false;
  const colours = () => dark.matches && !printing
    ? {ink: '#c6ccd2', grid: '#2b3138', line: '#4a525b', paper: '#1c2126'}
    : {ink: '#3c434a', grid: '#e7eaee', line: '#aab1b9', paper: '#ffffff'};
  // Plots are drawn for the screen's width; paper has its own, the one of main in the style sheet.
  const paperWidth = plot => plot.closest('.row') ? 210 : 680;
  const theme = (plot, layout) => {
    const c = colours(), change = {'font.color': c.ink, 'hoverlabel.bgcolor': c.paper, 'hoverlabel.font.color': c.ink};
    if (matchMedia('(hover: none)').matches) change.dragmode = false; // a finger on a plot scrolls the page
    for (const axis of Object.keys(layout).filter(key => /^[xy]axis/.test(key))) {
      change[axis + '.gridcolor'] = c.grid;
      change[axis + '.linecolor'] = c.line;
    }
    return Object.assign(change, printing ? {width: paperWidth(plot)} : {width: null, autosize: true});
  };
  const plots = new Map();
  for (const plot of document.querySelectorAll('.plot')) {
    const figure = JSON.parse(plot.nextElementSibling.textContent);
    plots.set(plot, {layout: figure.layout, x: figure.data.map(trace => trace.x)});
    Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displayModeBar: false})
      .then(() => Plotly.relayout(plot, theme(plot, figure.layout)));
  }
  const recolour = () => plots.forEach(({layout}, plot) => Plotly.relayout(plot, theme(plot, layout)));
  dark.addEventListener('change', recolour);
  addEventListener('beforeprint', () => { printing = true; recolour(); });
  addEventListener('afterprint', () => { printing = false; recolour(); });
  for (const button of document.querySelectorAll('.toggle button')) {
    button.addEventListener('click', () => {
      const plot = button.closest('figure').querySelector('.plot'), log = button.dataset.scale === 'log';
      // A logarithmic axis has no zero: without this, plotly draws a flat line from it.
      const x = plots.get(plot).x.map(values => log ? values.map(value => value > 0 ? value : null) : values);
      Plotly.update(plot, {x}, {'xaxis.type': button.dataset.scale, 'xaxis.autorange': true, 'xaxis.dtick': log ? 'D2' : null});
      for (const other of button.parentElement.children) other.setAttribute('aria-pressed', String(other === button));
    });
  }
})();
"""
