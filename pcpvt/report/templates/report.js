// Tooltips of the charts: the points nearest to the pointer, each [x in the SVG, x as text, y in the SVG, y as text].
const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
for (const chart of document.querySelectorAll('.chart')) {
  const curves = JSON.parse(chart.dataset.series);
  const svg = chart.querySelector('svg'), cross = svg.querySelector('.cross');
  const tip = chart.appendChild(document.createElement('div'));
  tip.className = 'card tip';
  const addLine = (text, color) => {
    const row = tip.appendChild(document.createElement('div'));
    if (color !== undefined) row.appendChild(document.createElement('i')).style.background = `var(--c${color})`;
    row.append(text);
  };
  svg.addEventListener('pointerleave', () => { tip.style.display = cross.style.display = 'none'; });
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const pointer = (event.clientX - box.left) * scale;
    const points = curves.map(curve => nearest(curve.points, pointer)), first = nearest(points, pointer);
    tip.replaceChildren();
    addLine(`${chart.dataset.x} ${first[1]}`);
    curves.forEach((curve, i) => addLine(`${curve.name}  ${points[i][3]}`, curve.color));
    tip.style.display = cross.style.display = 'block';
    cross.setAttribute('transform', `translate(${first[0]})`);
    const x = first[0] / scale, left = x + 14 + tip.offsetWidth > box.width ? x - tip.offsetWidth - 6 : x + 22;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${box.top - chart.getBoundingClientRect().top + 8}px`;
  });
}
