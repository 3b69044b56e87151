"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

  // The figure of a panel with one choice applied: what the choice does not name stays as it is.
  const chosen = (figure, patch) => {
    const copy = structuredClone({ data: figure.data, layout: figure.layout });
    if (patch) {
      copy.data = copy.data.map((trace, i) => ({ ...trace, ...structuredClone(patch.data[i]) }));
      copy.layout = { ...copy.layout, ...structuredClone(patch.layout) };
    }
    return copy;
  };

  const showRows = (table, rows) => {
    const lines = rows.map(([name, value]) => {
      const line = document.createElement("tr");
      const head = document.createElement("th");
      const cell = document.createElement("td");
      head.scope = "row";
      head.textContent = name;
      cell.textContent = value;
      line.append(head, cell);
      return line;
    });
    table.tBodies[0].replaceChildren(...lines);
  };

  for (const element of document.querySelectorAll("[data-panel]")) {
    const figure = figures[element.dataset.panel];
    const plot = element.querySelector(".plot");
    const select = element.querySelector("select");
    const detail = element.querySelector(".detail");
    const show = () => {
      const index = select ? Number(select.value) : 0;
      const patch = figure.choice ? figure.choice.patches[index] : null;
      const { data, layout } = chosen(figure, patch);
      Plotly.react(plot, data, layout, config);
      if (detail) showRows(detail, figure.choice.rows[index]);
    };
    show();
    if (!select) continue;
    select.addEventListener("change", show);
    const search = element.querySelector("input[type=search]");
    if (!search) continue;
    const options = [...select.options];
    search.addEventListener("input", () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = options.filter((option) => words.every((word) => option.text.toLowerCase().includes(word)));
      const before = select.value;
      select.replaceChildren(...found);
      select.disabled = found.length === 0;
      search.classList.toggle("empty", found.length === 0);
      if (found.length === 0) return;
      select.value = found.some((option) => option.value === before) ? before : found[0].value;
      if (select.value !== before) show();
    });
  }
})();
