/** The page's beginning: who is here, and which parts are shown. */

import { remembered } from "./api.js";
import { setUpChat } from "./chat.js";
import { $, h, say, show } from "./dom.js";
import { span } from "./format.js";
import { isFinal, signIn, signOut, whenSignedOut } from "./live.js";
import { setUpMemory } from "./memory.js";
import { setUpModels } from "./models.js";
import { setUpNotices } from "./notices.js";
import { setUpOverview } from "./overview.js";
import { setUpRequests } from "./requests.js";
import { known, on } from "./store.js";
import { setUpTheme } from "./theme.js";
import { setUpUsage } from "./usage.js";

const keysAreAsked = document.documentElement.dataset.keys === "asked";

function drawWho() {
  const { signedIn, me } = known;
  show($("board"), signedIn && known.server !== null); // not before what is wrong is known: it stands above
  show($("who"), signedIn && keysAreAsked);
  show($("sign-out"), signedIn && keysAreAsked);
  if (!me) return;
  const left = me.expires ? me.expires - Date.now() / 1000 : Infinity;
  const ends = left < 7 * 86_400 ? ` · ends in ${span(Math.max(0, left))}` : "";
  $("who").replaceChildren(h("b", { text: me.id }), h("span", { text: `${me.admin ? "admin" : "infer"}${ends}` }));
  document.body.classList.toggle("weak", !me.admin);
  show($("requests"), me.admin);
  show($("weaker"), !me.admin);
  const side = $(me.admin ? "right" : "left");
  if ($("usage").parentNode !== side) side.append($("usage"));
}

function drawLink() {
  const { state } = known.link;
  const words = { live: "Live", connecting: "Connecting", lost: "Not connected", paused: "Paused" };
  const link = $("link");
  show(link, state in words);
  say(link, words[state] ?? "");
  link.dataset.state = state;
  $("board").classList.toggle("stale", state === "lost");
}

function askForKey(reason = "") {
  show($("sign-in"), true);
  say($("key-error"), reason);
  $("key").setAttribute("aria-invalid", String(Boolean(reason)));
  $("key").value = "";
  $("key").focus();
}

/** With `again` a gateway that does not answer is asked again: the page was open before it. */
async function enter(secret, { again = false, ...how } = {}) {
  const button = $("sign-in").querySelector("button");
  button.disabled = true;
  try {
    await signIn(secret, how);
    show($("sign-in"), false);
    say($("key-error"), "");
    $("main").focus({ preventScroll: true });
  } catch (error) {
    if (!again || isFinal(error)) return askForKey(error.message);
    show($("sign-in"), true);
    say($("key-error"), `${error.message} Trying again …`);
    setTimeout(() => known.signedIn || enter(secret, { again, ...how }), 3000);
  } finally {
    button.disabled = false;
  }
}

whenSignedOut((reason) => askForKey(reason));
on(["who", "models"], drawWho);
on(["link"], drawLink);
setUpTheme($("theme"));
const PARTS = [setUpNotices, setUpOverview, setUpMemory, setUpModels, setUpRequests, setUpChat, setUpUsage];
PARTS.forEach((setUp) => setUp());

$("sign-out").addEventListener("click", () => signOut());
$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  enter($("key").value.trim());
});

const kept = remembered();
if (!keysAreAsked) enter(null, { remember: false, again: true });
else if (kept) enter(kept, { again: true });
else askForKey();
