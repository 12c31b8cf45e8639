"""The report's CSS and its few lines of JavaScript: light and dark, no fonts, scripts or images from elsewhere."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2330; --soft: #5b6577; --line: #dfe3ea; --grid: #eceff4;
  --right: #2a78d6; --wrong: #d65a1f;
  --c0: #2a78d6; --c1: #d65a1f; --c2: #12906b; --c3: #a24bb8; --c4: #b07d00; --c5: #5b6577;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161d; --card: #1b212b; --ink: #e6eaf1; --soft: #9aa5b8; --line: #323b49; --grid: #28303c;
    --right: #4c9cf5; --wrong: #f0834a;
    --c0: #5aa5f7; --c1: #f58b52; --c2: #3cc498; --c3: #cd84e0; --c4: #e0b040; --c5: #9aa5b8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 0; }
p { margin: 4px 0 12px; } .soft, td.soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; margin: 18px 0 0; }
.tiles div { padding: 10px 14px; } .tiles b { display: block; font-size: 22px; font-weight: 600; line-height: 1.3; }
.tiles span { color: var(--soft); font-size: 13px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 12px; }
.chart { margin: 0; position: relative; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 12px 4px; min-width: 0; }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 16px; padding: 0 6px; }
.chart ul { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0; padding: 0; list-style: none; font-size: 13px;
  color: var(--soft); }
.chart li b { color: var(--ink); font-weight: 600; }
.chart li i { display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.chart li.faint i { opacity: .55; }
.chart svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11.5px system-ui, "Segoe UI", "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); } svg .cross { stroke: var(--soft);
  stroke-dasharray: 3 3; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { stroke-width: 1.3; opacity: .55; }
.tip { position: absolute; pointer-events: none; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px;
  padding: 6px 10px; font-size: 12.5px; box-shadow: 0 4px 14px rgb(0 0 0 / .18); white-space: nowrap;
  display: none; z-index: 2; }
.tip i, .spot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 4px 14px 4px 0; vertical-align: top; overflow-wrap: break-word; }
th, .number, .figures td { white-space: nowrap; }
tr + tr > * { border-top: 1px solid var(--grid); } .number { text-align: right; }
.scroll { overflow-x: auto; }
.matrix table { border-spacing: 2px; border-collapse: separate; }
.matrix th, .matrix td { border: 0; padding: 0; font-size: 12px; text-align: center; }
.matrix td { width: 38px; min-width: 12px; height: 30px; vertical-align: middle; border-radius: 4px;
  background: var(--grid); color: var(--soft); }
.matrix td[style] { background: color-mix(in srgb, var(--hue) calc(18% + 82% * var(--v)), var(--card));
  color: var(--ink); }
.matrix td.deep { color: #fff; } .matrix td.diagonal { --hue: var(--right); } .matrix td { --hue: var(--wrong); }
.matrix tbody th { text-align: right; vertical-align: middle; padding: 0 8px 0 0; max-width: 160px;
  overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.matrix thead th { padding: 0 1px 4px; max-width: 44px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.matrix.small td { width: 16px; height: 16px; border-radius: 2px; } .matrix.small table { border-spacing: 1px; }
.matrix.small thead th { writing-mode: vertical-rl; text-align: right; max-height: 130px; max-width: none; }
.bar { width: 30%; min-width: 80px; } .bar span { display: block; height: 9px; margin-top: 6px; border-radius: 3px;
  background: var(--right); min-width: 1px; }
.bar { background: linear-gradient(var(--grid), var(--grid)) 0 10px / calc(100% - 14px) 9px no-repeat; }
.wide { width: 100%; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 12px; }
.pictures figure { margin: 0; padding: 10px; } .pictures img { width: 100%; aspect-ratio: 1;
  object-fit: contain; border-radius: 6px;
  background: var(--grid); display: block; }
.pictures figcaption { font-size: 13px; line-height: 1.4; margin-top: 8px; overflow-wrap: anywhere; }
.pictures .is { color: var(--wrong); font-weight: 600; } .pictures .name { color: var(--soft); font-size: 11.5px; }
details summary { cursor: pointer; color: var(--soft); margin: 8px 0; }
dl { columns: 2 380px; column-gap: 40px; margin: 0; font-size: 14px; }
dl div { display: flex; gap: 14px; break-inside: avoid; padding: 2px 0; } dt { color: var(--soft); flex: 0 0 170px; }
dd { margin: 0; overflow-wrap: anywhere; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 0 12px; }
.beside section { display: flex; flex-direction: column; } .beside .card { flex: 1; }
code { font: 13px ui-monospace, Consolas, monospace; }
@media print { body { background: #fff; } .card, .chart { break-inside: avoid; } }
"""

# The nearest point of every curve under the pointer, in a box beside it.
JS = """
for (const chart of document.querySelectorAll('.chart')) {
  const series = JSON.parse(chart.dataset.series);
  const svg = chart.querySelector('svg'), cross = svg.querySelector('.cross');
  const tip = chart.appendChild(document.createElement('div'));
  tip.className = 'tip';
  const hide = () => { tip.style.display = 'none'; cross.setAttribute('visibility', 'hidden'); };
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const at = (event.clientX - box.left) * scale;
    const near = series.map(s => s.p.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const first = near.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    cross.setAttribute('x1', first[0]); cross.setAttribute('x2', first[0]); cross.setAttribute('visibility', 'visible');
    tip.replaceChildren();
    const line = (text, color) => {
      const row = tip.appendChild(document.createElement('div'));
      if (color !== undefined) row.appendChild(document.createElement('i')).style.background = `var(--c${color})`;
      row.append(text);
    };
    line(`${chart.dataset.x} ${first[2]}`);
    series.forEach((s, i) => line(`${s.n}  ${near[i][3]}`, s.c));
    tip.style.display = 'block';
    const x = first[0] / scale, left = x + 14 + tip.offsetWidth > box.width ? x - tip.offsetWidth - 6 : x + 22;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${box.top - chart.getBoundingClientRect().top + 8}px`;
  });
}
"""
