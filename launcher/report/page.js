"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(plot.querySelector("script").textContent), svg = plot.querySelector("svg");
  if (!data.x.length) continue;
  const tip = document.createElement("div"), ns = "http://www.w3.org/2000/svg";
  const cross = document.createElementNS(ns, "line");
  tip.className = "tip"; plot.append(tip);
  cross.setAttribute("class", "cross"); cross.setAttribute("y1", data.top); cross.setAttribute("y2", data.bottom);
  const place = x => data.left + (x - data.low) / (data.high - data.low) * (data.right - data.left);
  plot.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect(), px = (event.clientX - box.left) / box.width * data.width;
    let best = 0;
    data.x.forEach((x, i) => { if (Math.abs(place(x) - px) < Math.abs(place(data.x[best]) - px)) best = i; });
    const at = place(data.x[best]);
    cross.setAttribute("x1", at); cross.setAttribute("x2", at); svg.append(cross);
    tip.replaceChildren();
    const head = document.createElement("b"), half = (data.span - 1) / 2, x = data.x[best];
    head.textContent = data.span > 1 ? `steps ${Math.ceil(x - half)} to ${Math.floor(x + half)}` : `step ${x}`;
    tip.append(head);
    for (const s of data.series) {
      const line = document.createElement("div"), dot = document.createElement("i");
      dot.style.background = `var(--c${s.colour})`;
      line.append(dot, `${s.name}  ${s.y[best]}`); tip.append(line);
    }
    tip.style.display = "block";
    const left = at / data.width * box.width;
    tip.style.left = (left + tip.offsetWidth + 20 > box.width ? left - tip.offsetWidth - 12 : left + 12) + "px";
    tip.style.top = "12px";
  });
  plot.addEventListener("mouseleave", () => { tip.style.display = "none"; cross.remove(); });
}
