// Before the first paint, or a page that was set to dark would flash in white.
try {
  const chosen = localStorage.getItem("corral.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is forbidden here: the system's choice holds
}
